"""What every part uses: errors, files, the screen, secrets, the machine, the network."""
