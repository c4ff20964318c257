"""Methods: what is trained. One file and one row here adds one."""

from compressft.methods.adapter import Adapter
from compressft.methods.diff import Diff
from compressft.methods.full import Full
from compressft.methods.fusion import Fusion
from compressft.methods.head_gates import HeadGates
from compressft.methods.layers import Layers
from compressft.methods.lsh_attention import LshAttention
from compressft.methods.mask import Mask
from compressft.methods.peft import Peft
from compressft.methods.prefix import PrefixTuning
from compressft.methods.probe import Probe
from compressft.methods.scalar_mix import ScalarMix
from compressft.methods.side import Side
from compressft.methods.task_vector import CodedTaskVector
from compressft.transform import Transform

METHODS: dict[str, type[Transform]] = {
    "full": Full,
    "probe": Probe,
    "layers": Layers,
    "adapter": Adapter,
    "fusion": Fusion,
    "side": Side,
    "scalar_mix": ScalarMix,
    "prefix": PrefixTuning,
    "peft": Peft,
    "mask": Mask,
    "diff": Diff,
    "task_vector": CodedTaskVector,
    "head_gates": HeadGates,
    "lsh_attention": LshAttention,
}
