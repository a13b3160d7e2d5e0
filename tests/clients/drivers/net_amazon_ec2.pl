# Net::Amazon::EC2, driven as clients/driving.py says.
use strict;
use warnings;
use JSON::PP;
use MIME::Base64;
use Net::Amazon::EC2;
use Scalar::Util qw(blessed);
use Time::HiRes qw(sleep);

my ($action, $endpoint, @rest) = @ARGV;
my $ec2 = Net::Amazon::EC2->new(
    AWSAccessKeyId  => $ENV{AWS_ACCESS_KEY_ID},
    SecretAccessKey => $ENV{AWS_SECRET_ACCESS_KEY},
    base_url        => $endpoint,
);

sub shown { my ($task) = @_; return { id => $task->bundle_id, state => $task->state } }

sub bundle {
    my ($instance, $bucket, $prefix, $policy, $signature) = @_;
    return shown($ec2->bundle_instance(
        InstanceId                         => $instance,
        'Storage.S3.AWSAccessKeyId'        => $ENV{AWS_ACCESS_KEY_ID},
        'Storage.S3.Bucket'                => $bucket,
        'Storage.S3.Prefix'                => $prefix,
        'Storage.S3.UploadPolicy'          => encode_base64($policy, ''),
        'Storage.S3.UploadPolicySignature' => $signature,
    ));
}

sub wait_for {
    my ($id) = @_;
    while (1) {
        # It fails on a task without progress.
        my $tasks = eval { $ec2->describe_bundle_tasks(BundleId => $id) };
        return shown($tasks->[0]) if $tasks and $tasks->[0]->state =~ /^(complete|failed)$/;
        sleep 0.1;
    }
}

my %actions = (
    bundle  => \&bundle,
    wait    => \&wait_for,
    cancel  => sub { shown($ec2->cancel_bundle_task(BundleId => $_[0])) },
    version => sub { { version => $Net::Amazon::EC2::VERSION } },
);

my $answer = eval { $actions{$action}->(@rest) } || refusal($@);
print encode_json($answer);

sub refusal {
    my ($error) = @_;
    die $error unless blessed $error and $error->isa('Net::Amazon::EC2::Errors');
    return { error => $error->errors->[0]->code };
}
