"""The same comparison on a GPU: `fastff bench --device cuda`."""
