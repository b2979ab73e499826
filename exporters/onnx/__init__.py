"""ONNX graphs: capture, cores, generation, finishing, ONNX Runtime."""
