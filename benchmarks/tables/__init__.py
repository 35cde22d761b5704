"""Result tables on real data, each made by one command that runs the missing cells only."""
