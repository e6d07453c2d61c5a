"""Where selections are tried before they enter the library: ``python -m`` this package."""
