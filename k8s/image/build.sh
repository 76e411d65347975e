#!/usr/bin/env bash
# Builds the image of what is committed, tagged with raylaunch's own version; then push what the last line says.
#
#     k8s/image/build.sh REPOSITORY [options of docker build]
set -euo pipefail
cd "$(dirname "$0")/../.."

repository=${1:?which repository?}
version=$(git show HEAD:launcher/__init__.py | sed -n 's/^__version__ = "\(.*\)"$/\1/p')
git archive HEAD | docker build --file k8s/image/Dockerfile --tag "$repository:$version" \
    --build-arg VERSION="$version" --build-arg REVISION="$(git rev-parse HEAD)" "${@:2}" -
echo "$repository:$version"
