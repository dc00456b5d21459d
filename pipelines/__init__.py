"""One file a job; each reads as its workflow."""
