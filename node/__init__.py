"""The long-running process: frames in, a memory on the device, answers and telemetry out."""
