/* fsync and fdatasync that do nothing: a test that trusts them has to notice. */
int fsync(int descriptor) { (void)descriptor; return 0; }
int fdatasync(int descriptor) { (void)descriptor; return 0; }
