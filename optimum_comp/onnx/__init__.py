"""ONNX: export with a parity check, and quantization recipes for ONNX Runtime."""
