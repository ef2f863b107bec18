"""No test reaches a server outside, or the caches and tokens of the machine."""

import atexit
import os
import tempfile

from hub.address import URL


# Set before any import of the stack; child processes inherit it. At URL nobody answers before a test asks for `hub`.
HF_HOME = tempfile.TemporaryDirectory(prefix="optvq_hf_home_")
atexit.register(HF_HOME.cleanup)
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ["HF_ENDPOINT"] = URL
os.environ["HF_HOME"] = HF_HOME.name
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores
    os.environ["OMP_NUM_THREADS"] = "1"

PLUGINS = ("golden", "hub", "networks", "processes", "published", "runs", "web")
pytest_plugins = [f"fixtures.{name}" for name in PLUGINS]
