"""Pure tensor mathematics: nothing here imports transformers, optimum or ONNX Runtime."""
