"""Speed, memory and error of kdkernels beside the hardware's floor and other libraries."""
