"""What users would run instead of cifar_hpc, written as they would write it: the recipe is the report's in each."""
