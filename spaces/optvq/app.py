"""OptVQ in a web page: a picture beside its reconstruction, its codes as maps, edits of codes, and pictures between two.

python spaces/optvq/app.py [folders of your own models]

Handlers of events get what the browser sends, `preprocess=False`: Gradio would read pictures as 8-bit RGB, and answer numbers
beyond a slider and files that are no pictures with errors of its own.
"""

import base64
import html
import io
import sys
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from picture_codes import (
    ASSIGNMENTS,
    SHARES,
    Codes,
    Tokenizer,
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

from optvq_hf.image_opening_optvq import open_image


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
SIZES = (1, 2, 4)
SHOWN = 512  # pixels of the picture to edit
WIDEST = 7  # tokens that one edit writes, in each direction

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
mistake = partial(gr.Error, print_exception=False)  # one of the visitor, which the server's log need not show


def source_of(name: str) -> str:
    """The folder or Hub id behind the name of a model; visitors choose Hub ids alone, not folders of the server."""
    if name in MODELS:
        folder = TRAINED / MODELS[name]
        return str(folder) if folder.is_dir() else f"optvq-hf/optvq-{MODELS[name]}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if "/" not in name or Path(name).exists():
        raise mistake("choose a model of the list, or write a Hub id, owner/name")
    return name


def open_tokenizer(name: str | None) -> Tokenizer:
    name = (name or "").strip()
    source = source_of(name)
    try:
        return load(source)
    except (OSError, ValueError) as error:
        raise mistake(f"{name}: {str(error).splitlines()[0]}") from error


def open_picture(file: dict) -> Image.Image:
    path = Path(file["path"])
    try:
        return open_image(path)
    except (OSError, ValueError) as error:
        raise mistake(str(error).replace(str(path), path.name)) from error


def embed(picture: Image.Image, alternative: str) -> str:
    """The picture in HTML, with a text for those who do not see it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}">'


def compare(original: Image.Image, reconstruction: Image.Image) -> str:
    """One picture over the other, and a slider over both, for mouse, finger and keyboard."""
    pictures = (
        embed(original, "the picture as the model gets it"),
        embed(reconstruction, "its reconstruction from codes"),
    )
    slider = """<input type="range" aria-label="where the picture ends and its reconstruction begins, in percent"
        oninput="this.parentNode.style.setProperty('--share', this.value + '%')">"""
    return f"""<div class="comparison" style="--share: 50%">{"".join(pictures)}<i></i>{slider}</div>
        <div class="sides"><span>picture</span><span>reconstruction</span></div>"""


def figures(pictures: list[tuple[Image.Image, str, str]]) -> str:
    """Small pictures side by side, from each picture, its text for those who do not see it, and its caption."""
    parts = [
        f"<figure>{embed(picture, alternative)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for picture, alternative, caption in pictures
    ]
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


def show(name: str, assignment: str, scale: int, file: dict | None, before: Tokens | None, edited: Codes | None):
    """Everything that follows from a new picture, model, assignment or size."""
    if file is None:
        return None, None, "", "", "", *(gr.skip() for _ in range(4)), ""
    tokenizer = open_tokenizer(name)
    side = min(scale, max(SIZES)) * tokenizer.model.config.image_size
    tokens = tokenize(tokenizer, open_picture(file), assignment, side)
    original, reconstruction = input_picture(tokenizer, tokens), decode(tokenizer, tokens.codes)
    channels, (_, rows, columns) = tokenizer.channels, tokens.codes.shape
    sizes = {"PSNR": f"{psnr(original, reconstruction):.1f} dB"} | statistics(tokenizer, tokens)
    maps = [
        (code_map, f"map of the codes of {channel}, {rows} x {columns} squares", channel)
        for code_map, channel in zip(code_maps(tokenizer, tokens.codes), channels, strict=True)
    ]
    stays = before is not None and before.codes.shape == tokens.codes.shape
    row, column, channel = ({} if stays else {"value": value} for value in (rows // 2, columns // 2, 0))
    return (
        tokens,
        keep_edits(before, edited, tokens),
        compare(original, reconstruction),
        facts(sizes, usage(tokenizer, tokens.codes)),
        figures(maps),
        gr.Slider(maximum=rows - 1, **row),
        gr.Slider(maximum=columns - 1, **column),
        gr.Dropdown(choices=[(name, number) for number, name in enumerate(channels)], **channel),
        gr.Slider(maximum=tokenizer.model.config.codebook_size - 1),
        "",
    )


def keep_edits(before: Tokens | None, edited: Codes | None, after: Tokens) -> Codes:
    """The codes after, with the edits before if they are of the same picture, model and size; says if there were others."""
    if before is None or edited is None or (edited == before.codes).all():
        return after.codes
    if before.source == after.source and torch.equal(before.pixel_values, after.pixel_values):
        return np.where(edited != before.codes, edited, after.codes)
    gr.Info("Your edits are undone: they were of another picture, model or size.")
    return after.codes


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


def within(number: float | None, most: int, least: int = 0) -> int:
    """A number that was typed, as its slider can show it; an empty field is the least."""
    return int(min(max(number or least, least), most))


def place_of(edited: Codes, row: float | None, column: float | None, width: float | None) -> tuple[int, int, int]:
    _, rows, columns = edited.shape
    return within(row, rows - 1), within(column, columns - 1), within(width, WIDEST, 1)


def look(tokens: Tokens | None, edited: Codes | None, row, column, width, channel: int):
    """The picture with the chosen tokens framed, and the code at their middle."""
    if tokens is None or edited is None:
        return None, 0
    row, column, width = place_of(edited, row, column, width)
    return marked(decode(load(tokens.source), edited), edited, row, column, width), int(edited[channel, row, column])


def click(edited: np.ndarray, event: gr.SelectData):
    """Row and column of a token from the pixel that was clicked."""
    x, y = event.index
    return int(y * edited.shape[1] // SHOWN), int(x * edited.shape[2] // SHOWN)


def write(tokens: Tokens | None, edited: Codes | None, row, column, width, channel: int, code: float | None):
    if tokens is None or edited is None:
        raise mistake("choose a picture first")
    code = within(code, load(tokens.source).model.config.codebook_size - 1)
    row, column, width = place_of(edited, row, column, width)
    return write_code(edited, channel, row, column, code, width)


def interpolate(tokens: Tokens | None, assignment: str, kind: str, file: dict | None):
    """Pictures between the first and the second, each decoded from codes."""
    if tokens is None or file is None:
        raise mistake("choose two pictures first")
    tokenizer = load(tokens.source)
    first = tokens.codes
    other = tokenize(tokenizer, open_picture(file), assignment, tokens.pixel_values.shape[-1]).codes
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
    slider = partial(gr.Slider, step=1, min_width=120, buttons=[])
    with gr.Blocks(title="OptVQ: a picture as codes", fill_width=True) as page:
        tokens, edited = gr.State(), gr.State()
        gr.Markdown(INTRODUCTION)
        with gr.Row(elem_id="page"):
            with gr.Column(min_width=300):
                picture = gr.Image(
                    str(first), label="Picture", height=230, sources=["upload", "clipboard"],
                    alt_text="the picture that was chosen", elem_id="picture",
                )  # fmt: skip
                examples = gr.Column()
            with gr.Column(min_width=300), gr.Tabs():
                with gr.Tab("Compare"):
                    comparison = gr.HTML(padding=False, elem_id="comparison")
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
                                row = slider(0, 31, 16, label="Row", elem_id="row")
                                column = slider(0, 31, 16, label="Column", elem_id="column")
                            with gr.Row():
                                channel = gr.Dropdown([("head 1", 0)], value=0, label="Code of", min_width=120)
                                width = slider(1, WIDEST, 1, step=2, label="Width")
                            code = slider(0, 1023, 0, label="Code", elem_id="code")
                            with gr.Row():
                                writing = gr.Button("Write code", variant="primary", min_width=120, elem_id="write")
                                undoing = gr.Button("Undo all edits", min_width=120)
                with gr.Tab("Mix"):
                    gr.Markdown(MIXING)
                    with gr.Row():
                        second = gr.Image(
                            str(HERE / "examples" / EXAMPLES["coffee"][0]), label="Second picture", height=200,
                            sources=["upload", "clipboard"], alt_text="the second picture", min_width=200,
                        )  # fmt: skip
                        with gr.Column(min_width=200):
                            kind = gr.Radio(["mix vectors", "mix positions"], value="mix vectors", label="How")
                            mixing = gr.Button("Mix", variant="primary", elem_id="mix")
                    strip = gr.HTML(padding=False, elem_id="strip")

            with gr.Column(min_width=300):
                name = gr.Dropdown(
                    list(MODELS), value="photos", label="Model", allow_custom_value=True, info="or a Hub id",
                    elem_id="model",
                )  # fmt: skip
                assignment = gr.Radio(list(ASSIGNMENTS), value="nearest", label="Assignment", info=ASSIGNMENT)
                scale = gr.Radio(list(SIZES), value=4, label="Size", info="times the size the model was trained at")
            with examples:
                gr.Examples(
                    [[str(HERE / "examples" / file), model, size] for file, model, size in EXAMPLES.values()],
                    [picture, name, scale], example_labels=list(EXAMPLES), label="Examples",
                )  # fmt: skip

        place = [tokens, edited, row, column, width, channel]
        shown = [tokens, edited, comparison, numbers, maps, row, column, channel, code, strip]
        changes = [page.load, picture.change, name.change, assignment.change, scale.change]
        gr.on(
            changes, show, [name, assignment, scale, picture, tokens, edited], shown, preprocess=False,
            show_progress_on=[comparison], trigger_mode="always_last",
        )  # fmt: skip
        canvas.select(click, [edited], [row, column])
        moves = [edited.change, row.change, column.change, width.change, channel.change]
        gr.on(moves, look, place, [canvas, code], preprocess=False, show_progress="hidden", trigger_mode="always_last")
        writing.click(write, [*place, code], [edited], preprocess=False)
        undoing.click(lambda tokens: tokens and tokens.codes, [tokens], [edited])
        mixing.click(interpolate, [tokens, assignment, kind, second], [strip], preprocess=False)
    return page


def make_theme() -> gr.themes.Default:
    """Gradio's theme with fonts of the reader's machine, and with texts and buttons of enough contrast."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    texts = ("block_info_text_color", "block_label_text_color", "block_title_text_color", "body_text_color_subdued")
    colors = {"": "*neutral_600", "_dark": "*neutral_300"}
    texts_in_colors = {f"{text}{mode}": color for text in texts for mode, color in colors.items()}
    buttons = {f"button_primary_background_fill{mode}": "*primary_600" for mode in colors}
    return gr.themes.Default(primary_hue="indigo", **fonts).set(**texts_in_colors, **buttons)


def launch(*folders: str, **options):
    """Serves the page, with the models in these folders too; options are those of `Blocks.launch`."""
    MODELS.update({folder: str(Path(folder).resolve(strict=True)) for folder in folders})
    return make_page().launch(theme=make_theme(), css_paths=HERE / "style.css", **options)


if __name__ == "__main__":
    launch(*sys.argv[1:])
