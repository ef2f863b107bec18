"""`import optvq_hf` is quick, and transformers knows OptVQ all the same, whatever is imported in whatever order."""

import subprocess
import sys
from pathlib import Path

import pytest

import optvq_hf
from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQModel


HEAVY = ("torch", "transformers", "datasets", "accelerate", "torchvision")


def run(script: str, *arguments: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    script = f"import sys, optvq_hf; assert optvq_hf.__version__; print([n for n in {HEAVY} if n in sys.modules])"
    assert run(script) == "[]\n"


def test_names_are_those_of_their_modules():
    script = (
        "import optvq_hf, importlib\n"
        "before = dir(optvq_hf)\n"
        "values = {name: getattr(optvq_hf, name) for name in optvq_hf.__all__}\n"
        "assert before == sorted(before) and set(optvq_hf.__all__) <= set(before)\n"
        "for name, module in optvq_hf._MODULE_OF.items():\n"
        "    assert values[name] is getattr(importlib.import_module(f'optvq_hf.{module}'), name)\n"
        "    assert values[name].__module__ == f'optvq_hf.{module}'\n"
        "assert optvq_hf.sinkhorn.sinkhorn_assign\n"
        "from optvq_hf import *\n"
        "assert OptVQModel is optvq_hf.OptVQModel"
    )
    run(script)


def test_a_type_checker_sees_the_same_names():
    assert sorted(optvq_hf.__all__) == optvq_hf.__all__ == sorted([*optvq_hf._MODULE_OF, "sinkhorn"])
    text = Path(optvq_hf.__file__).read_text()
    block = text.partition("if TYPE_CHECKING:\n")[2].partition("\n__version__")[0]
    for name, module in optvq_hf._MODULE_OF.items():
        [line] = [line for line in block.splitlines() if f"from .{module} import " in line]
        assert name in line.partition(" import ")[2].split(", ")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'optvq_hf' has no attribute 'OptVQModle'"):
        optvq_hf.OptVQModle  # noqa: B018
    with pytest.raises(ImportError, match="OptVQModle"):
        from optvq_hf import OptVQModle  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small model with its image processor."""
    path = tmp_path_factory.mktemp("registered")
    OptVQModel(
        OptVQConfig(backbone="plain_cnn", image_size=8, codebook_size=8, codebook_dim=4, num_codebook_heads=1)
    ).save_pretrained(path)
    OptVQImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(path)
    return str(path)


USE_EVERYTHING = """
import sys
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageToImage, pipeline
folder = sys.argv[1]
found = [AutoConfig.from_pretrained(folder), AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)]
found += [AutoModelForImageToImage.from_pretrained(folder), pipeline("image-tokenization", model=folder)]
found += [pipeline("image-reconstruction", model=folder), AutoModel.from_config(found[0])]
print({type(value).__module__ for value in found} - {f"optvq_hf.{name}_optvq" for name in
      ("configuration", "modeling", "image_processing", "pipeline")})
import optvq_hf
assert type(found[1]) is optvq_hf.OptVQModel
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("optvq_hf")])
"""


@pytest.mark.parametrize(
    "first",
    [
        "import optvq_hf",
        "from transformers import AutoModel; import optvq_hf",
        "from optvq_hf import ImageTokenizationPipeline",  # a pipeline imports the registry it goes into
        "import optvq_hf, transformers.modeling_layers",  # imports AutoModel before it defines what our model needs
    ],
)
def test_transformers_knows_optvq_in_every_order_of_imports(folder, first):
    assert run(first + USE_EVERYTHING, folder) == "set()\n[]\n"


def test_failed_imports_stay_failed_imports():
    """What they raise reaches the caller; registrations wait for an import that succeeds."""
    run(
        "import importlib.util, inspect, sys, optvq_hf\n"
        "assert importlib.util.find_spec('transformers.no_such_module') is None\n"
        "sys.modules['transformers.models.auto.auto_factory'] = None\n"
        "for name in ('transformers.no_such_module', 'transformers.models.auto.modeling_auto'):\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError: continue\n"
        "    raise AssertionError(name)\n"
        "del sys.modules['transformers.models.auto.auto_factory']\n"
        "from transformers import AutoModel\n"
        "from optvq_hf import OptVQConfig, OptVQModel\n"
        "assert type(AutoModel.from_config(OptVQConfig(backbone='plain_cnn'))) is OptVQModel\n"
        "assert 'class AutoModel' in inspect.getsource(sys.modules[AutoModel.__module__])"
    )
