"""A batch on a GPU: kernels that follow the table of addresses, layers over them, graphs of them, and the Executor's device."""
