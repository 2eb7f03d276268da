"""Files of any storage, and the memory of CPUs and GPUs that their bytes pass through. The only place that does I/O."""
