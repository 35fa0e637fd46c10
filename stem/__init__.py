"""The mathematics of STEM inversion, on plain tensors: nothing in here knows of ComfyUI.

    keys, values of all frames --em.estimate_basis--> 256 bases --attention--> the context every frame reads
    latents --ddim: noise levels, inversion update--> Trajectory, and the Basis of every block and level
    reconstruction, edit --metrics--> PSNR, SSIM, flicker

One alphabet of shapes throughout: `f` frames, `h` heads, `n` tokens, `d` head channels, `m` bases,
`c` channels, `t` noise levels.
"""
