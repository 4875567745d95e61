"""Diffusion and flow matching around the trainer: schedules, preprocessors, samplers."""

from ditty_di.diffusion.digits import Digits, Recognition
from ditty_di.diffusion.grid import SampleGrid
from ditty_di.diffusion.min_snr import MinSNR
from ditty_di.diffusion.models import DiT
from ditty_di.diffusion.predictions import Epsilon, Prediction, Sample, Velocity
from ditty_di.diffusion.processors import DDPM, ClassLabels, FlowMatching, logit_normal, uniform
from ditty_di.diffusion.samplers import DDIM, Euler, Sampler, generate, guided
from ditty_di.diffusion.schedules import NoiseSchedule, cosine, linear, scaled_linear

__all__ = [
    "DDIM",
    "DDPM",
    "ClassLabels",
    "DiT",
    "Digits",
    "Epsilon",
    "Euler",
    "FlowMatching",
    "MinSNR",
    "NoiseSchedule",
    "Prediction",
    "Recognition",
    "Sample",
    "SampleGrid",
    "Sampler",
    "Velocity",
    "cosine",
    "generate",
    "guided",
    "linear",
    "logit_normal",
    "scaled_linear",
    "uniform",
]
