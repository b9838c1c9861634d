"""One file a revision, numbered; each must let the version before it run on."""
