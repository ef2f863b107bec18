"""OptVQ in a web page: a picture beside its reconstruction, its codes as maps, edits of codes, and pictures between two.

python spaces/optvq/app.py
"""

import base64
import html
import io
from pathlib import Path

import gradio as gr
import numpy as np
from picture_codes import (
    ASSIGNMENTS,
    SHARES,
    Tokens,
    code_maps,
    decode,
    enlarge,
    input_picture,
    load,
    mix_positions,
    mix_vectors,
    psnr,
    statistics,
    tokenize,
    usage,
    write_code,
)
from PIL import Image, ImageDraw


HERE = Path(__file__).resolve().parent
TRAINED = HERE.parents[1] / "model_cards"
MODELS = {"photos": "photos32", "clothes": "fashion_mnist", "digits": "mnist"}
# Picture, model, and how many times the model's own size the picture is taken at.
EXAMPLES = {
    "cat": ("chelsea.jpg", "photos", 4),
    "coffee": ("coffee.jpg", "photos", 4),
    "astronaut": ("astronaut.jpg", "photos", 4),
    "boot": ("boot.png", "clothes", 1),
    "pullover": ("pullover.png", "clothes", 1),
    "seven": ("seven.png", "digits", 1),
}
SHOWN = 512  # pixels of a large picture

INTRODUCTION = """# OptVQ: a picture as codes
The model cuts a picture into a grid of tokens and writes each down as a few numbers, its codes. The reconstruction is made
from these numbers alone."""
ASSIGNMENT = "nearest: each feature's closest code. potentials, sinkhorn: codes are also used evenly."
MAPS = """One map for each code of the tokens, one square for each token. **Squares of similar colour have codes of similar
vectors**: red, green and blue follow the directions in which the code vectors differ most. Edges in the picture show as edges
in the maps; flat parts repeat a code."""
EDITING = """Click a token in the picture, or choose row and column, counted from 0 at the top left. Give one of its codes
another number: the decoder paints what the new codes say. Tokens around it change a little too, as the decoder looks at
neighbours."""
MIXING = """Codes are names: there is no code halfway between 17 and 41. Two other things work. **Mix vectors** takes the point
between the two code vectors at every position and gives it a code again. **Mix positions** takes all codes of the second
picture at a share of the positions. Under each result: how many of its codes are those of the first, of the second, and of
neither."""
CSS = """
footer { display: none !important }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 12px }
.figures figure { margin: 0 }
.figures img { width: 100%; image-rendering: pixelated; border-radius: 4px }
.figures figcaption { font-size: 14px; line-height: 1.35; white-space: pre-line }
.facts p { margin: 0 0 4px; font-size: 14px }
.facts table { border-collapse: collapse; width: 100% }
.facts :is(table, thead, tbody, tr, th, td) { border: none !important }
.facts :is(th, td) { padding: 1px 8px 1px 0 !important; font-size: 14px; text-align: left }
.facts tbody :is(th, td) { border-top: 1px solid var(--border-color-primary) !important; font-weight: normal }
"""
# Gradio gives the pictures of its slider no text for those who do not see them.
NAME_PICTURES = """() => document.querySelectorAll("#comparison img").forEach(
    (image, number) => image.alt = ["the picture as the model gets it", "its reconstruction from codes"][number])"""


def source_of(name: str) -> str:
    """The folder or Hub id behind the name of a model; other names stand for themselves."""
    if name not in MODELS:
        return name.strip()
    folder = TRAINED / MODELS[name]
    return str(folder) if folder.is_dir() else f"optvq-hf/optvq-{MODELS[name]}"


def open_tokenizer(name: str):
    try:
        return load(source_of(name))
    except (OSError, ValueError) as error:
        raise gr.Error(f"{name}: {str(error).splitlines()[0]}") from error


def figures(pictures: list[tuple[Image.Image, str, str]]) -> str:
    """Small pictures side by side, from each picture, its text for those who do not see it, and its caption."""
    parts = []
    for picture, alternative, caption in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}">'
        parts.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


def facts(sizes: dict[str, str], rows: list[tuple[str, int, float, float]]) -> str:
    """Sizes as lines, and the usage of every head as a table."""
    lines = "".join(f"<p><b>{html.escape(name)}</b> {html.escape(text)}</p>" for name, text in sizes.items())
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("", "different codes", "of those possible", "perplexity")
    )
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{number:,}</td><td>{percent:.0f} %</td><td>{perplexity:,.1f}</td></tr>'
        for name, number, percent, perplexity in rows
    )
    return f'<div class="facts">{lines}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def show(name: str, assignment: str, scale: int, picture: Image.Image | None):
    """Everything that follows from a new picture, model or assignment."""
    if picture is None:
        return None, None, None, "", "", None, *(gr.skip() for _ in range(4)), ""
    tokenizer = open_tokenizer(name)
    tokens = tokenize(tokenizer, picture, assignment, scale * tokenizer.model.config.image_size)
    original, reconstruction = input_picture(tokenizer, tokens), decode(tokenizer, tokens.codes)
    channels, (_, rows, columns) = tokenizer.channels, tokens.codes.shape
    sizes = {"PSNR": f"{psnr(original, reconstruction):.1f} dB"} | statistics(tokenizer, tokens)
    maps = [
        (code_map, f"map of the codes of {channel}, {rows} x {columns} squares", channel)
        for code_map, channel in zip(code_maps(tokenizer, tokens.codes), channels, strict=True)
    ]
    return (
        tokens,
        tokens.codes,
        (enlarge(original, SHOWN), enlarge(reconstruction, SHOWN)),
        facts(sizes, usage(tokenizer, tokens.codes)),
        figures(maps),
        marked(reconstruction, tokens.codes, rows // 2, columns // 2, 1),
        gr.Slider(maximum=rows - 1, value=rows // 2),
        gr.Slider(maximum=columns - 1, value=columns // 2),
        gr.Dropdown(choices=list(enumerate_names(channels)), value=0),
        gr.Slider(
            maximum=tokenizer.model.config.codebook_size - 1, value=int(tokens.codes[0, rows // 2, columns // 2])
        ),
        "",
    )


def enumerate_names(names: list[str]):
    return ((name, number) for number, name in enumerate(names))


def marked(picture: Image.Image, codes: np.ndarray, row: int, column: int, width: int) -> Image.Image:
    """The picture with a frame around the tokens that an edit changes."""
    large, side = enlarge(picture, SHOWN), SHOWN / codes.shape[1]
    left, top = (column - width // 2) * side, (row - width // 2) * side
    draw = ImageDraw.Draw(large)
    for margin, color in ((2, "black"), (0, "white")):  # seen on dark and on light
        draw.rectangle(
            (left - margin, top - margin, left + width * side + margin, top + width * side + margin), None, color, 2
        )
    return large


def look(name: str, edited: np.ndarray | None, row: int, column: int, channel: int, width: int):
    """The picture with the chosen tokens framed, and the code at their middle."""
    if edited is None:
        return None, 0
    return marked(decode(open_tokenizer(name), edited), edited, row, column, width), int(edited[channel, row, column])


def click(edited: np.ndarray, event: gr.SelectData):
    """Row and column of a token from the pixel that was clicked."""
    x, y = event.index
    return int(y * edited.shape[1] // SHOWN), int(x * edited.shape[2] // SHOWN)


def write(name: str, edited: np.ndarray | None, row: int, column: int, channel: int, width: int, code: int):
    if edited is None:
        raise gr.Error("choose a picture first")
    edited = write_code(edited, channel, row, column, int(code), width)
    return edited, marked(decode(open_tokenizer(name), edited), edited, row, column, width)


def interpolate(name: str, assignment: str, scale: int, kind: str, tokens: Tokens | None, second: Image.Image | None):
    """Pictures between the first and the second, each decoded from codes."""
    if tokens is None or second is None:
        raise gr.Error("choose two pictures first")
    tokenizer = open_tokenizer(name)
    first = tokens.codes
    other = tokenize(tokenizer, second, assignment, scale * tokenizer.model.config.image_size).codes
    strip = []
    for share in SHARES:
        if kind == "mix vectors":
            codes = mix_vectors(tokenizer, first, other, share, assignment)
        else:
            codes = mix_positions(first, other, share)
        of_first, of_second = (100 * np.mean(codes == ends) for ends in (first, other))
        neither = 100 * np.mean((codes != first) & (codes != other))
        counted = f"first {of_first:.0f} %\nsecond {of_second:.0f} %\nneither {neither:.0f} %"
        alternative = f"picture {100 * share:.0f} % of the way from the first to the second"
        strip.append((decode(tokenizer, codes), alternative, f"share {100 * share:.0f} %\n{counted}"))
    return figures(strip)


def make_page() -> gr.Blocks:
    first = HERE / "examples" / EXAMPLES["cat"][0]
    with gr.Blocks(title="OptVQ: a picture as codes", fill_width=True) as page:
        tokens, edited = gr.State(), gr.State()
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    str(first), label="Picture", type="pil", height=230, sources=["upload", "clipboard"],
                    alt_text="the picture that was chosen", elem_id="picture",
                )  # fmt: skip
                name = gr.Dropdown(
                    list(MODELS),
                    value="photos",
                    label="Model",
                    allow_custom_value=True,
                    info="or a Hub id, or a folder",
                )
                assignment = gr.Radio(list(ASSIGNMENTS), value="nearest", label="Assignment", info=ASSIGNMENT)
                scale = gr.Radio([1, 2, 4], value=4, label="Size", info="times the size the model was trained at")
                gr.Examples(
                    [[str(HERE / "examples" / file), model, size] for file, model, size in EXAMPLES.values()],
                    [picture, name, scale], example_labels=list(EXAMPLES), label="Examples",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Compare"):
                    label = "Picture | reconstruction"
                    slider = gr.ImageSlider(
                        label=label, height=400, max_height=400, buttons=[], format="png", elem_id="comparison"
                    )
                    numbers = gr.HTML(padding=False, elem_id="numbers")
                with gr.Tab("Codes"):
                    gr.Markdown(MAPS)
                    maps = gr.HTML(padding=False, elem_id="maps")
                with gr.Tab("Edit"):
                    gr.Markdown(EDITING)
                    with gr.Row():
                        canvas = gr.Image(
                            label="Decoded from the edited codes", height=360, interactive=False, min_width=280, buttons=[],
                            alt_text="picture decoded from the edited codes, with a frame around the chosen tokens",
                            format="png", elem_id="canvas",
                        )  # fmt: skip
                        with gr.Column(min_width=280):
                            with gr.Row():
                                row = gr.Slider(0, 31, 16, step=1, label="Row", min_width=120, elem_id="row")
                                column = gr.Slider(0, 31, 16, step=1, label="Column", min_width=120, elem_id="column")
                            with gr.Row():
                                channel = gr.Dropdown([("head 1", 0)], value=0, label="Code of", min_width=120)
                                width = gr.Slider(1, 7, 1, step=2, label="Width", min_width=120)
                            code = gr.Slider(0, 1023, 0, step=1, label="Code", elem_id="code")
                            with gr.Row():
                                writing = gr.Button("Write code", variant="primary", min_width=120, elem_id="write")
                                undoing = gr.Button("Undo all edits", min_width=120)
                with gr.Tab("Mix"):
                    gr.Markdown(MIXING)
                    with gr.Row():
                        second = gr.Image(
                            str(HERE / "examples" / EXAMPLES["coffee"][0]), label="Second picture", type="pil", height=200,
                            sources=["upload", "clipboard"], alt_text="the second picture", min_width=200,
                        )  # fmt: skip
                        with gr.Column(min_width=200):
                            kind = gr.Radio(["mix vectors", "mix positions"], value="mix vectors", label="How")
                            mixing = gr.Button("Mix", variant="primary", elem_id="mix")
                    strip = gr.HTML(padding=False, elem_id="strip")

        settings, place = [name, assignment, scale], [row, column, channel, width]
        shown = [tokens, edited, slider, numbers, maps, canvas, row, column, channel, code, strip]
        changes = [page.load, picture.change, name.input, assignment.input, scale.input]
        gr.on(changes, show, [*settings, picture], shown, show_progress_on=[slider]).then(None, js=NAME_PICTURES)
        canvas.select(click, [edited], [row, column]).then(look, [name, edited, *place], [canvas, code])
        gr.on([row.release, column.release, channel.input, width.release], look, [name, edited, *place], [canvas, code])
        writing.click(write, [name, edited, *place, code], [edited, canvas])
        undoing.click(lambda tokens: tokens and tokens.codes, [tokens], [edited]).then(
            look, [name, edited, *place], [canvas, code]
        )
        mixing.click(interpolate, [*settings, kind, tokens, second], [strip])
    return page


def make_theme() -> gr.themes.Default:
    """Gradio's theme with fonts of the reader's machine, and with texts and buttons of enough contrast."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    texts = ("block_info_text_color", "block_label_text_color", "block_title_text_color", "body_text_color_subdued")
    colors = {"": "*neutral_600", "_dark": "*neutral_300"}
    texts_in_colors = {f"{text}{mode}": color for text in texts for mode, color in colors.items()}
    buttons = {f"button_primary_background_fill{mode}": "*primary_600" for mode in colors}
    return gr.themes.Default(primary_hue="indigo", **fonts).set(**texts_in_colors, **buttons)


def launch(**options):
    """Serves the page; options are those of `Blocks.launch`."""
    return make_page().launch(theme=make_theme(), css=CSS, **options)


if __name__ == "__main__":
    launch()
