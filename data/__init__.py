# a package of its own, so that no other "data" on the import path is taken for it
