"""`python -m thrave.moto`: moto's server with bundle tasks. The arguments are those of `moto_server`."""

from moto.server import main

import thrave.moto

if __name__ == "__main__":
    thrave.moto.install()
    main()
