"""Registers OptVQ with transformers' Auto classes and pipelines, without importing them.

Importing the model, its image processor and the pipelines takes longer than importing torch and transformers, and most
programs need only some of them. So OptVQ is added to each registry right after transformers itself has imported the registry,
or at once if it is imported already; nobody can use a registry before.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_optvq import OptVQConfig

    AutoConfig.register(OptVQConfig.model_type, OptVQConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageToImage

    from .configuration_optvq import OptVQConfig
    from .modeling_optvq import OptVQModel

    AutoModel.register(OptVQConfig, OptVQModel, exist_ok=True)
    AutoModelForImageToImage.register(OptVQConfig, OptVQModel, exist_ok=True)


def _register_image_processor() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_optvq import OptVQConfig
    from .image_processing_optvq import OptVQImageProcessor

    classes = {"torchvision": OptVQImageProcessor}
    AutoImageProcessor.register(OptVQConfig, image_processor_classes=classes, exist_ok=True)


def _register_no_video_processor() -> None:
    # transformers 5.23 mistakes an image processor's remote code for a video processor's, and would ask whether to run it.
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    from .configuration_optvq import OptVQConfig

    AutoVideoProcessor.register(OptVQConfig, None, exist_ok=True)


def _register_pipelines() -> None:
    from transformers.models.auto.modeling_auto import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .pipeline_optvq import ImageReconstructionPipeline, ImageTokenizationPipeline

    classes = {"image-tokenization": ImageTokenizationPipeline, "image-reconstruction": ImageReconstructionPipeline}
    for task, pipeline_class in classes.items():
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline_class, pt_model=AutoModel, type="image")


# Called once transformers has imported the module that holds the registry.
REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.models.auto.video_processing_auto": _register_no_video_processor,
    "transformers.pipelines": _register_pipelines,
}


class _Watcher(MetaPathFinder):
    """An import hook that finds no modules itself; it only notices when transformers has imported a registry.

    Our classes import much of transformers, some of which imports registries. So a registration waits until no module of
    transformers or of this package is half imported in this thread.
    """

    def __init__(self, registrations: dict[str, Callable[[], None]]):
        self.waiting = dict(registrations)
        self.of_thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("transformers", __package__):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.of_thread.depth = depth = getattr(self.of_thread, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.of_thread.depth = depth - 1
            if depth == 1:
                self.register()

        loader.exec_module = exec_module  # this loader loads this one module

    def register(self) -> None:
        """Runs every registration whose registry has been imported; removes the hook after the last one."""
        for registry in [name for name in self.waiting if name in sys.modules]:
            register = self.waiting.pop(registry, None)  # its imports may have done it
            if register is None:
                continue
            try:
                register()
            except BaseException:
                self.waiting[registry] = register  # the next import tries again
                raise
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def register_with_transformers() -> None:
    """Registers OptVQ with AutoConfig, AutoModel, AutoModelForImageToImage, AutoImageProcessor and the pipelines.

    Each registration runs as soon as transformers has imported the registry.
    """
    watcher = _Watcher(REGISTRATIONS)
    sys.meta_path.insert(0, watcher)
    watcher.register()
