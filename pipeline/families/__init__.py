"""How the models of transformers give up their experts: one door for most, an adapter each for those with routers of their own."""
