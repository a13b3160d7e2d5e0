# The AWS SDK for Ruby, version 1, driven as clients/driving.py says.
require "aws-sdk-v1"
require "base64"
require "json"
require "uri"

action, endpoint, *rest = ARGV
uri = URI(endpoint)
EC2 = AWS::EC2::Client.new(ec2_endpoint: uri.host, ec2_port: uri.port, use_ssl: false, max_retries: 0)

def shown(task)
  { id: task[:bundle_id], state: task[:state] }
end

def bundle(instance, bucket, prefix, policy, signature, **options)
  s3 = {
    aws_access_key_id: ENV.fetch("AWS_ACCESS_KEY_ID"),
    bucket: bucket,
    prefix: prefix,
    upload_policy: Base64.strict_encode64(policy),
    upload_policy_signature: signature
  }
  shown(EC2.bundle_instance(instance_id: instance, storage: { s3: s3 }, **options)[:bundle_instance_task])
end

def tasks(**input)
  EC2.describe_bundle_tasks(**input)[:bundle_instance_tasks_set].map { |task| shown(task) }
end

def wait(id)
  loop do
    task = tasks(bundle_ids: [id]).first
    return task if %w[complete failed].include?(task[:state])

    sleep 0.1
  end
end

begin
  answer =
    case action
    when "bundle" then bundle(*rest)
    when "dry-run" then bundle(*rest, dry_run: true)
    when "describe" then { tasks: tasks(filters: [{ name: "s3-prefix", values: rest }]) }
    when "wait" then wait(*rest)
    when "cancel" then shown(EC2.cancel_bundle_task(bundle_id: rest.first)[:bundle_instance_task])
    when "version" then { version: AWS::VERSION }
    end
rescue AWS::Errors::Base => e
  answer = { error: e.code }
end
puts JSON.generate(answer)
