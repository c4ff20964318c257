"""Methods: what is trained. One file and one row here adds one."""

from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.layers import Layers
from compressft.methods.probe import Probe
from compressft.transform import Transform

METHODS: dict[str, type[Transform]] = {
    "full": Full,
    "probe": Probe,
    "layers": Layers,
    "adapter": Adapter,
}
