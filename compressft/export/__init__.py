"""Export: fold -> onnx -> verify -> measure; the file that ships is the file that was proved."""

from compressft.export.flow import export
from compressft.export.session import open_session

__all__ = ["export", "open_session"]
