"""Family: Stable Diffusion under a pipeline class of our own."""

from diffusers import StableDiffusionPipeline

from erase.families.sd import StableDiffusion


class WatercolourPipeline(StableDiffusionPipeline):
    """The same as StableDiffusionPipeline."""


class Watercolour(StableDiffusion):
    """Loads folders whose model_index.json names WatercolourPipeline."""

    family = "watercolour"
    pipelines = ("WatercolourPipeline",)
    pipeline_module = __name__
