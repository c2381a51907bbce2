"""C++ kernels for CPUs with AVX-512 and bfloat16, and what builds and calls them. Must not decide anything."""
