# This file makes data/ a package, so that no other "data" on the import path is taken for it.
