"""Export: fold -> onnx -> verify -> measure; the file that ships is the file that was proved."""
