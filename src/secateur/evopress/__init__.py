"""EvoPress on real models: levels of every site, candidates tried out as whole models, a search that goes on."""
