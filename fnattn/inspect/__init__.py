"""Looking inside: gradients of single samples, curvature, kernels, influence, attention maps, states, interventions.

Pure functions over trees of parameters, for every family and for whole models. Losses are functions loss(params, batch) -> 0-d;
vectors are trees like params; randomness comes from a key. One file per idea:

    per_sample      gradients of single samples, norms, moments, signal-to-noise
    privacy         clipped and noisy gradients (DP-SGD)
    gradient_noise  gradient noise scale
    gradient_norms  norms per leaf, layer and head; gradients of tapped values
    curvature       Hessian-, Gauss-Newton- and Fisher-vector products
    traces          trace and diagonal from random probes
    spectra         Lanczos, spectral density, top eigenpairs, sharpness
    tangent_kernel  empirical neural tangent kernel
    influences      influence functions (CG, LiSSA), TracIn
    linearized      linearised models
    maps            exact attention maps
    readings        rollout, gradient x attention, effective context, entropy, decays, Taylor's error
    states          gradients through states
    patching        activation patching, causal tracing
    flat            the bridge to tools that want a dict of tensors or a Module
"""

from ._vectors import dot as dot
from ._vectors import ravel as ravel
from ._vectors import unravel as unravel
from .curvature import dense as dense
from .curvature import empirical_fisher_vp as empirical_fisher_vp
from .curvature import fisher_vp as fisher_vp
from .curvature import ggn_vp as ggn_vp
from .curvature import hvp as hvp
from .flat import as_module as as_module
from .flat import flat_fn as flat_fn
from .flat import flat_params as flat_params
from .gradient_noise import NoiseScale as NoiseScale
from .gradient_noise import noise_scale as noise_scale
from .gradient_noise import noise_scale_from_moments as noise_scale_from_moments
from .gradient_noise import noise_scale_from_norms as noise_scale_from_norms
from .gradient_norms import head_norms as head_norms
from .gradient_norms import head_weight_norms as head_weight_norms
from .gradient_norms import layer_norms as layer_norms
from .gradient_norms import leaf_norms as leaf_norms
from .gradient_norms import tap_grads as tap_grads
from .influences import Solution as Solution
from .influences import influence as influence
from .influences import solve_cg as solve_cg
from .influences import solve_lissa as solve_lissa
from .influences import tracin as tracin
from .linearized import linearize as linearize
from .maps import Attended as Attended
from .maps import attended as attended
from .maps import attention_map as attention_map
from .maps import attention_maps as attention_maps
from .maps import attentions_of as attentions_of
from .maps import from_taps as from_taps
from .patching import Patches as Patches
from .patching import causal_trace as causal_trace
from .patching import patch as patch
from .per_sample import Moments as Moments
from .per_sample import PerSample as PerSample
from .per_sample import moments as moments
from .per_sample import per_sample_grads as per_sample_grads
from .per_sample import per_sample_norms as per_sample_norms
from .per_sample import signal_to_noise as signal_to_noise
from .privacy import clip as clip
from .privacy import private_grad as private_grad
from .readings import Context as Context
from .readings import Decay as Decay
from .readings import GradientTimesAttention as GradientTimesAttention
from .readings import TaylorError as TaylorError
from .readings import decay_from_taps as decay_from_taps
from .readings import decay_spectrum as decay_spectrum
from .readings import effective_context as effective_context
from .readings import entropy as entropy
from .readings import gradient_times_attention as gradient_times_attention
from .readings import rollout as rollout
from .readings import shares as shares
from .readings import taylor_error as taylor_error
from .readings import taylor_error_from_taps as taylor_error_from_taps
from .spectra import Density as Density
from .spectra import EigenPairs as EigenPairs
from .spectra import Lanczos as Lanczos
from .spectra import density as density
from .spectra import eigenpairs as eigenpairs
from .spectra import lanczos as lanczos
from .spectra import sharpness as sharpness
from .spectra import spectrum as spectrum
from .states import Memory as Memory
from .states import memory as memory
from .states import state_influence as state_influence
from .states import state_jacobian as state_jacobian
from .tangent_kernel import KernelSpectrum as KernelSpectrum
from .tangent_kernel import ntk as ntk
from .tangent_kernel import ntk_alignment as ntk_alignment
from .tangent_kernel import ntk_blocks as ntk_blocks
from .tangent_kernel import ntk_diagonal as ntk_diagonal
from .tangent_kernel import ntk_spectrum as ntk_spectrum
from .tangent_kernel import ntk_vp as ntk_vp
from .traces import Estimate as Estimate
from .traces import hutchinson_diagonal as hutchinson_diagonal
from .traces import hutchinson_trace as hutchinson_trace
