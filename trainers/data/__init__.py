"""From a folder, bucket or manifest to batches of pixels: index, fetch, decode, order, augment, load."""
