"""(to be replaced)"""
def write(config, material, runs, home, console):
    for run in runs:
        console.print(run)
