"""Several models of one turbofit: each has its sessions, one address has them all."""
