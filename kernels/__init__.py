"""GPU kernels of AnchorScope; installed as ``anchorscope.kernels``. Import the modules by name."""
