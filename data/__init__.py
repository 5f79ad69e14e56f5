"""The data set as code: CLEVRER's layout, camera, physics, rendering, video and stores. Imports nothing of ours."""
