"""Always-consistent replication of block devices between clouds, over an encrypted overlay."""

__version__ = "0.1.0"
