"""The demo: two stock engines in one memory budget, measured against a static split of it."""
