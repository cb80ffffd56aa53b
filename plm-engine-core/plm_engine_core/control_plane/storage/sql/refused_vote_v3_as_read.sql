-- What a ticket looked like to who read it: another one whenever its state, votes or comments are others. hitl/ticket.py makes
-- the same of what it reads. Comments are added without holding the ticket, so of one that comes at this moment nobody has read.
CREATE FUNCTION engine_ticket_revision_v1(p_ticket approval_tickets) RETURNS text
LANGUAGE sql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT concat_ws('-', p_ticket.state, CASE WHEN p_ticket.escalated_at IS NULL THEN 0 ELSE 1 END, count(*),
        COALESCE((extract(epoch FROM max(v.voted_at)) * 1000000)::bigint, 0),
        (SELECT count(*) FROM approval_comments AS c WHERE c.tenant_id = p_ticket.tenant_id AND c.ticket_id = p_ticket.id))
    FROM approval_votes AS v WHERE v.tenant_id = p_ticket.tenant_id AND v.ticket_id = p_ticket.id
$$;

-- Why a voter cannot be counted, or null. Nobody decides what they asked for themselves, or had asked for by delegation;
-- an input, which allows nothing, they may give where the command says that the policy lets them. A command of a node that knows
-- no asks says nothing of it, and can only deny one. Who says as which revision it was read is refused when it is another now.
CREATE OR REPLACE FUNCTION engine_refused_vote_v3(p_ticket approval_tickets, p_principal jsonb, c jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_input constant boolean := p_ticket.capability = 'provide_input';
BEGIN
    IF v_input AND c ->> 'vote' = 'approve' THEN
        RETURN jsonb_build_object('reason', 'ticket_kind',
            'message', 'the ticket asks for an input: give it with provide_input, or deny it');
    ELSIF NOT v_input AND c ->> 'vote' = 'provide_input' THEN
        RETURN jsonb_build_object('reason', 'ticket_kind', 'message', 'the ticket asks for an approval: approve or deny it');
    ELSIF NOT (v_input AND COALESCE((c ->> 'requester_may')::boolean, false))
       AND (p_ticket.requested_by = (c ->> 'voter')::uuid OR COALESCE(p_principal -> 'delegated_by', '[]') ? (c ->> 'voter')) THEN
        RETURN jsonb_build_object('reason', 'separation_of_duties', 'message', CASE WHEN v_input
            THEN 'the policy has the requester of a run answer none of its asks, nor who had it requested'
            ELSE 'the requester of a call cannot decide its approval, nor can who had it requested' END);
    ELSIF p_ticket.state = 'expired' THEN
        RETURN jsonb_build_object('reason', 'approval_expired', 'message', format('the deadline %s has passed; the %s is denied',
            p_ticket.deadline, CASE WHEN v_input THEN 'ask' ELSE 'call' END));
    ELSIF p_ticket.state <> 'pending' THEN
        RETURN jsonb_build_object('reason', 'already_decided',
            'message', format('the ticket is already %s', p_ticket.state));
    ELSIF (p_ticket.escalated_at IS NOT NULL) <> (c -> 'escalated')::boolean THEN
        RETURN jsonb_build_object('reason', 'escalated',
            'message', 'the ticket was handed on meanwhile; whoever decides it now needs another OAuth scope');
    ELSIF EXISTS (SELECT FROM approval_votes
                  WHERE tenant_id = p_ticket.tenant_id AND ticket_id = p_ticket.id AND voter = (c ->> 'voter')::uuid
                    AND vote <> c ->> 'vote') THEN
        RETURN jsonb_build_object('reason', 'already_voted',
            'message', 'you have voted on this ticket before, the other way; a vote is given once');
    ELSIF c ->> 'as_read' <> engine_ticket_revision_v1(p_ticket) THEN
        RETURN jsonb_build_object('reason', 'changed_meanwhile',
            'message', 'the ticket was voted or commented on, or handed on, since it was read');
    END IF;
    RETURN NULL;
END
$$;
