"""Pure floor: errors, time, types, keys, codecs, hashing, definitions, configuration, kernels."""
