"""Workers: their process, the plans they load, and how they run them."""
