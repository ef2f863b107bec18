"""Nothing of the machine and no credentials are published: a folder full of traps, and a scan of every byte."""

import json
import os
import re
import shutil
from secrets import token_hex

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from folders import contents
from hub.checks import fails
from optvq_hf.commands import publish, train
from optvq_hf.commands.publish import main
from optvq_hf.publishing import repository
from optvq_hf.training.checkpoints import read_state, write_state
from optvq_hf.training.losses.discriminator import PatchDiscriminator
from training.runs import flags


SECRET = "s3cr3t" + token_hex(8)
TOKEN = "hf_" + token_hex(17)
HOME = "/home/alice-" + SECRET
ADDRESS = f"https://alice:{SECRET}@example.org/data?token={SECRET}"
PLACES = [
    ADDRESS,
    f"{HOME}/data",
    f"~{SECRET}/data",
    rf"C:\Users\{SECRET}\data",
    f"file://{HOME}/data",
    f"../{SECRET}/data",
    rf"data\users\{SECRET}",
    f"%2Fhome%2F{SECRET}%2Fdata",
    f"$HOME/{SECRET}/data",
    f"ssh {SECRET}@10.0.0.5:/data",
    f"{SECRET}@corp.com {TOKEN}",
]
TRAPS = {
    "record": {"place": PLACES, "nested": {"of": [{ADDRESS: ADDRESS}], "text": f"read {HOME}/a.png, then {ADDRESS}"}},
    "names": (
        ".env", ".git/config", "id_rsa", "credentials.json", "notes.md", "passport.png", "model-notes.safetensors", "x.yaml",
        "discriminator/.env", "discriminator/.git/config", "discriminator/notes.json", "discriminator/README.md",
        ".eval_results/secret.yaml", "last-checkpoint/.env", "last-checkpoint/config.json", "logs/events", "evil.py",
        "checkpoint-5/.env", "wandb/config.yaml", ".reconstructions.png", "training_log.jsonl.bak", "deep/er/recipe.yaml",
    ),
}  # fmt: skip


def set_traps(folder):
    """Plants the secret in and beside everything that is published."""
    PatchDiscriminator(1, 8, 1).save_pretrained(folder / "discriminator")
    discriminator = folder / "discriminator" / "model.safetensors"
    save_file(load_file(discriminator), discriminator, {"made in": HOME})
    config = folder / "discriminator" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": SECRET}))
    for name in TRAPS["names"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET)
    for name in ("metrics.json", "training_summary.json", "preprocessor_config.json", "config.json"):
        record = json.loads((folder / name).read_text())
        unknown = {"my_token": TOKEN, "note": f"host {SECRET}.corp.internal user {SECRET}"}
        for nested in ("versions", "alarms", "auto_map"):
            if nested in record:
                record[nested] |= unknown
        for values in record.get("by_assignment", {}).values():
            values |= unknown
        record |= {**unknown, "traps": TRAPS["record"], "_name_or_path": f"{HOME}/base"}
        (folder / name).write_text(json.dumps(record))
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "made in": HOME})
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    last = json.loads(lines.pop())
    lines = [json.dumps({**json.loads(line), **TRAPS["record"]}) for line in lines]
    lines += [f"cut off {SECRET}", json.dumps({**last, **TRAPS["record"]})]
    (folder / "training_log.jsonl").write_text("\n".join(lines))
    recipe = (folder / "recipe.yaml").read_text()
    traps = {"wandb_key": SECRET, "model": ADDRESS, "data_dir": PLACES[3], "dataset_config": f"x {HOME}/y"}
    traps |= {"tracker_project": f"{SECRET} {TOKEN}", "output_dir": HOME, "push_to_hub": f"{SECRET}/x"}
    traps |= {
        "image_column": PLACES[7],
        "train_split": PLACES[9],
        "discriminator_weights": PLACES[10],
        "eval_split": PLACES[6],
    }
    recipe = recipe.split("\n", 1)[0] + f"\n# {SECRET}\n" + yaml.safe_dump({**yaml.safe_load(recipe), **traps})
    (folder / "recipe.yaml").write_text(recipe)
    for name in ("reconstructions.png", "codebook_usage.png", "training_curves.png"):
        comment = PngInfo()
        comment.add_text("Source", f"{HOME}/data {SECRET}")
        comment.add_itxt("XML:com.adobe.xmp", SECRET)
        exif = Image.Exif()
        exif[270] = SECRET
        with Image.open(folder / name) as picture:
            picture.save(folder / name, pnginfo=comment, exif=exif)
        with open(folder / name, "ab") as file:
            file.write(SECRET.encode())


def assert_clean(files, *words):
    assert len(files) > 20
    for name, content in files.items():
        for word in (SECRET, TOKEN, "note", *words):
            if word == "note" and not name.endswith((".json", ".jsonl", ".yaml")):
                continue
            assert word.encode() not in content and word not in name, (name, word)


@pytest.mark.parametrize("edited", [False, True])
def test_a_folder_full_of_traps(hub, alice, run, monkeypatch, capsys, edited):
    set_traps(run)
    if edited:
        main([str(run), "alice/traps", "--card-only"])
        notes = f"\n[data]({ADDRESS}), {HOME}/data, {PLACES[4]}\n"
        (run / "README.md").write_text((run / "README.md").read_text() + notes)
    written = []
    complete = repository.complete
    monkeypatch.setattr(repository, "complete", lambda folder: (complete(folder), written.append(contents(folder))))
    main([str(run), "alice/traps", "--dry-run"])
    listed = set(re.findall(r"^ *[\d,]+  (\S+)$", capsys.readouterr().out, re.MULTILINE))
    main([str(run), "alice/traps"])
    files = hub.repository("alice/traps").files()
    files.pop(".gitattributes", None)
    assert files.keys() == listed == written[0].keys()
    of_discriminator = {name for name in files if name.startswith("discriminator")}
    assert of_discriminator == {"discriminator/config.json", "discriminator/model.safetensors"}
    assert {"recipe.yaml", "metrics.json", "training_log.jsonl", "reconstructions.png", "README.md"} < files.keys()
    assert not {"evil.py", "model-notes.safetensors", "passport.png", "last-checkpoint/config.json"} & files.keys()
    for one in (files, written[0]):
        assert_clean(one, str(run.parent), os.path.expanduser("~"))
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert "wandb_key" not in recipe and recipe["model"] == "https://example.org/data" and recipe["data_dir"] == "data"
    assert "traps" not in json.loads(files["metrics.json"]) and not {"output_dir", "tracker_project"} & recipe.keys()


def test_what_was_not_made_public_is_refused(run, tmp_path):
    """A net: what a file holds that is written without being made public."""
    folder = shutil.copytree(run, tmp_path / "out")
    for name, kind in ((TOKEN, "a token"), (f"{SECRET}@host", "a user at a host"), (f"x{HOME}", "a home folder")):
        (folder / "README.md").write_text(f"see {name}")
        with pytest.raises(ValueError, match=f"README.md would be published with what looks like {kind}") as raised:
            repository.complete(folder)
        assert SECRET not in str(raised.value)


def test_what_the_run_pushes_is_clean(hub, alice, tmp_path, monkeypatch):
    """Pushed checkpoints, with traps in the folders of the run and in the settings of its checkpoints."""
    from optvq_hf.publishing import checkpoint_pusher

    folder = tmp_path / SECRET / "run"
    push, received = checkpoint_pusher.CheckpointPusher.push, []

    def push_with_traps(self, checkpoint):
        for name in (".env", "notes.json", "discriminator/.env", "ema/id_rsa", "evil.py", "../.env"):
            (checkpoint / name).write_text(SECRET)
        state = read_state(checkpoint)
        state.settings |= {"wandb_key": SECRET, "data_dir": PLACES[3], "dataset_config": ADDRESS}
        write_state(checkpoint, state)
        push(self, checkpoint)
        self._thread.join()
        received.append(hub.repository("alice/pushed").files())
        state.settings |= {"data_dir": None, "dataset_config": None}
        del state.settings["wandb_key"]
        write_state(checkpoint, state)

    monkeypatch.setattr(checkpoint_pusher.CheckpointPusher, "push", push_with_traps)
    train.main(flags(folder, max_steps=8, save_every=4, push_to_hub="alice/pushed", discriminator_start=1))
    [files] = received
    assert {"recipe.yaml", "training_log.jsonl", "last-checkpoint/training_state.json"} < files.keys()
    assert "last-checkpoint/discriminator/model.safetensors" in files and "last-checkpoint/ema/config.json" in files
    assert not [name for name in files if ".env" in name or "notes" in name or "id_rsa" in name or "evil" in name]
    assert_clean(files, str(tmp_path), os.path.expanduser("~"))
    assert_clean(hub.repository("alice/pushed").files(), str(tmp_path))
    # What was pushed resumes.
    shutil.rmtree(folder)
    train.main(flags(folder, max_steps=8, discriminator_start=1, resume=restored(tmp_path / "again", files)))


def restored(folder, files) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    state = read_state(folder / "last-checkpoint")
    state.settings |= {"data_dir": None, "dataset_config": None}
    write_state(folder / "last-checkpoint", state)
    return str(folder / "last-checkpoint")


@pytest.mark.parametrize("name", ["metrics.json", "discriminator", "README.md", "deep/er/x", "reconstructions.png"])
def test_links_that_lead_out_are_refused(hub, alice, run, tmp_path, capsys, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    target = outside / "x"
    target.write_text(SECRET)
    link = run / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside if name == "discriminator" else target)
    for options in ([], ["--dry-run"]):
        line = fails(publish, [run, "alice/links", *options], capsys)
        assert f"{link} is a link that leads out of {run}" in line
    assert ("model", "alice/links") not in hub.repositories
    link.unlink()
    (run / "notes").symlink_to(run / "recipe.yaml")  # stays inside
    main([str(run), "alice/links", "--dry-run"])


def test_no_name_is_no_folder(alice, run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    for words, name in ((["", "alice/x", "--dry-run"], "FOLDER"), ([".", ""], "REPO")):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert capsys.readouterr().err.startswith(f"optvq publish: error: {name} must not be empty")


def test_a_picture_that_is_none(alice, run, capsys):
    (run / "reconstructions.png").write_text(SECRET)
    assert "reconstructions.png is not a PNG" in fails(publish, [run, "alice/x", "--dry-run"], capsys)


def test_a_discriminator_folder_without_one(alice, run, capsys):
    (run / "discriminator").mkdir()
    (run / "discriminator" / ".env").write_text(SECRET)
    main([str(run), "alice/x", "--dry-run"])
    assert "discriminator" not in capsys.readouterr().out
    (run / "discriminator" / "model.safetensors").write_text(SECRET)
    line = fails(publish, [run, "alice/x", "--dry-run"], capsys)
    assert "cannot publish the discriminator in" in line and SECRET not in line
