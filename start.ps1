# Start the platform and the activity job on it, with Docker: .\start.ps1
# Windows PowerShell 5.1 doesn't stop where a program fails: each one is looked at.
$ErrorActionPreference = "Stop"
Set-Location $PSScriptRoot

docker compose up --build --detach --wait
if ($LASTEXITCODE) { exit $LASTEXITCODE }
docker compose run --rm activity
if ($LASTEXITCODE) { exit $LASTEXITCODE }

@"

The job runs.
  open      http://127.0.0.1:28081
  events    docker compose run --rm producer
  check     docker compose run --rm verify
  stop      docker compose down
"@
