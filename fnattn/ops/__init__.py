"""Pure tensor functions: the mathematics of every attention, each with a plain-torch reference and its kernels.

The C kernels of loops and attentions make zeros of subnormal numbers on x86; the references keep them.
"""

from . import layouts as layouts
from .associative_scan import associative_scan as associative_scan
from .axial_attention import axial_attention as axial_attention
from .block_sparse import block_sparse_attention as block_sparse_attention
from .cached_attention import cached_attention as cached_attention
from .causal_dot import causal_dot as causal_dot
from .conv_attention import conv_attention as conv_attention
from .coor_attention import coor_descent_attention as coor_descent_attention
from .coor_descent import coor_descent as coor_descent
from .gate_loop import gate_loop as gate_loop
from .gate_loop import simple_gate_loop as simple_gate_loop
from .heinsen import heinsen_gate_loop as heinsen_gate_loop
from .linear import linear as linear
from .masked_softmax import masked_softmax as masked_softmax
from .report import report as report
from .rms_norm import rms_norm as rms_norm
from .rotary import lang_freqs as lang_freqs
from .rotary import pixel_freqs as pixel_freqs
from .rotary import rotary as rotary
from .rotary import rotate as rotate
from .routing import route as route
from .routing import route_back as route_back
from .routing import topk as topk
from .scan import scan as scan
from .softmax import softmax_attention as softmax_attention
from .taylor import taylor as taylor
