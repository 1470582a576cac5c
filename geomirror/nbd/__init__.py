"""The block device front end: an NBD server and a small client."""
