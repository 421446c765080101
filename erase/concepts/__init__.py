"""Concepts as data: forget prompts, their anchors, retain prompts, and how a judge recognises the concept."""

from erase.concepts.classes import label_of as label_of
from erase.concepts.classes import of_class as of_class
from erase.concepts.concept import Concept as Concept
from erase.concepts.concept import FreeKind as FreeKind
from erase.concepts.concept import advice as advice
from erase.concepts.concept import apart as apart
from erase.concepts.concept import mapping as mapping
from erase.concepts.concept import override as override
from erase.concepts.concept import unite as unite
from erase.concepts.describe import describe as describe
from erase.concepts.host import erased_from as erased_from
from erase.concepts.presets import find as find
from erase.concepts.presets import load as load
from erase.concepts.presets import names as names
from erase.concepts.presets import preset_key as preset_key
from erase.concepts.presets import write as write
from erase.concepts.reference import in_prompts_of_the_code as in_prompts_of_the_code
