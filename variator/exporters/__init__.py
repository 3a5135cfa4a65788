"""Model and plugins -> bundle: ONNX graphs over one weight file, their FLOPs, the numeric gate."""
