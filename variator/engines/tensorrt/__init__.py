"""TensorRT and TensorRT-RTX: plans with shape profiles, built in a child process, run on NVIDIA GPUs."""
