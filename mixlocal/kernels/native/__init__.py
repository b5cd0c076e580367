"""The compiled kernels: `_native`, built from src/ by CMake; absent where no compiler was found at installation."""
