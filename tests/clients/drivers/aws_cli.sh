#!/bin/sh
# The AWS CLI, of either generation, which signs the upload policy itself; driven as clients/driving.py says.
# $AWS_CLI is the program.
set -u
action=$1 endpoint=$2
shift 2

ec2() {
    "$AWS_CLI" --endpoint-url "$endpoint" --output json ec2 "$@"
}

bundle() { # INSTANCE BUCKET PREFIX POLICY SIGNATURE [OPTION]
    ec2 bundle-instance --instance-id "$1" --bucket "$2" --prefix "$3" ${6:-} --query "$task" \
        --owner-akid "$AWS_ACCESS_KEY_ID" --owner-sak "$AWS_SECRET_ACCESS_KEY"
}

task='BundleTask.{id: BundleId, state: State}'
tasks='{tasks: BundleTasks[].{id: BundleId, state: State}}'

run() {
    case $action in
    bundle) bundle "$@" ;;
    dry-run) bundle "$@" --dry-run ;;
    describe) ec2 describe-bundle-tasks --filters "Name=s3-prefix,Values=$1" --query "$tasks" ;;
    wait) ec2 wait bundle-task-complete --bundle-ids "$1" &&
        ec2 describe-bundle-tasks --bundle-ids "$1" --query 'BundleTasks[0].{id: BundleId, state: State}' ;;
    cancel) ec2 cancel-bundle-task --bundle-id "$1" --query "$task" ;;
    version) "$AWS_CLI" --version | sed 's|^aws-cli/\([^ ]*\).*|{"version": "\1"}|' ;;
    esac
}

if ! said=$(run "$@" 2>&1); then
    code=$(printf '%s' "$said" | sed -n 's/.*An error occurred (\([^)]*\)).*/\1/p')
    [ -n "$code" ] || { echo "$said" >&2; exit 1; }
    said="{\"error\": \"$code\"}"
fi
printf '%s' "$said"
